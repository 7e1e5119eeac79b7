# Context: T = 16 stands for the paper's 256.
base = "context_2048.py"
block_size = 16
