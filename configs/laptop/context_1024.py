# Context: T = 64 stands for the paper's 1024.
base = "context_2048.py"
block_size = 64
