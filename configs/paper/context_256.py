# Context: T = 256.
base = "context_2048.py"
block_size = 256
batch_size = 64
