# Context: T = 512 stands for the paper's 8192.
base = "context_2048.py"
block_size = 512
