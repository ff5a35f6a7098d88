"""Other people's evaluation harnesses on checkpoints of ours."""
