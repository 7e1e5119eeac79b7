# Context: T = 4096.
base = "context_2048.py"
block_size = 4096
batch_size = 4
