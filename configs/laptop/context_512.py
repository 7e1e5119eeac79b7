# Context: T = 32 stands for the paper's 512.
base = "context_2048.py"
block_size = 32
