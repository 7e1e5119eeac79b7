# The ladder: weight decay 0.64 instead, which stands for the paper's 1.
base = "ladder_t4096.py"
weight_decay = 0.64
