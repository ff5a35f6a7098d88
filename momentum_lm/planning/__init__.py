"""What a training run needs before it starts: parameters, FLOPs, memory, time, communication."""
