# Context: T = 256 stands for the paper's 4096.
base = "context_2048.py"
block_size = 256
