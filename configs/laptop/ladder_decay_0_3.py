# The ladder: + weight decay 0.192, which stands for the paper's 0.3.
base = "ladder_t4096.py"
weight_decay = 0.192
