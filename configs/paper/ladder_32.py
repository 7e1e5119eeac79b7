# The recipe's baseline: L = 32 at the recipe's width. Each later step of the ladder starts
# from the last step that helped.
base = "base.py"
n_layer = 32
n_embd = 1120
ffn_hidden = 8960           # our choice: 8 x 1120, as in ladder_moe.py; 1.24B parameters
batch_size = 4
block_size = 2048           # our choice: the next step of the ladder has 4096
tokens_per_step = 2**21     # our choice: the batch of these runs is not stated
