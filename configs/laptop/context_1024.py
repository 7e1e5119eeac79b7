base = "context_2048.py"
block_size = 64
