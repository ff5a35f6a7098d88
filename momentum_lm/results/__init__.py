"""The store that studies write and reports read: records, predictions, scores of unfinished work, and the processes
that share it."""
