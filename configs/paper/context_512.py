# Context: T = 512.
base = "context_2048.py"
block_size = 512
batch_size = 32
