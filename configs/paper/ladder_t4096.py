# The ladder: + T = 4096.
base = "ladder_32.py"
block_size = 4096
batch_size = 2
