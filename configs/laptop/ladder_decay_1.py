# The ladder: weight decay 0.64 instead of 0.192. It stands for the paper's 1.
base = "ladder_t4096.py"
weight_decay = 0.64
