# The ladder: + T = 256, which stands for the paper's 4096.
base = "ladder_32.py"
block_size = 256
