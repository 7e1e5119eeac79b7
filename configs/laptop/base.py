# The paper's experiments on a laptop. Names are those of configs/paper/, so that every row of a table has the paper's
# beside it. Each file says what its value stands for. All members of a family see the same tokens.
data = "data/python"        # bytes
n_layer = 8                 # stands for the paper's 16; depths are halved: 6 8 12 16 for 12 16 24 32
n_head = 4                  # allows G = 1, 2 and 4
n_embd = 64                 # narrow, because depth is studied: 16 layers train in minutes on one core
init_std = 0.113            # 0.02 * sqrt(2048 / n_embd): the paper's 0.02 in units of 1/sqrt(width), so that a block
                            # adds the variance that it adds in the paper. With 0.02 at width 64 it adds 1/2,000 of
                            # that, and training lets block 0 dominate the stream
block_size = 128            # stands for 2048; contexts are a sixteenth: 16 ... 512 for 256 ... 8192

learning_rate = 3e-3        # the best of four rates on seed 100, for this width and 2,000 steps
max_steps = 2000            # usefulness at 8 layers is then in the middle of its range: a member can be better or worse
tokens_per_step = 1024      # half of train.py's default, so that a run takes minutes on one core; 2M tokens in all
warmup_steps = 100          # 5%, as in the paper's depth runs (1,000 of 19,000)
weight_decay = 0.064        # stands for 0.1. The effect of decay depends on learning_rate x weight_decay x steps. At
                            # 0.64 times the paper's decay, this product is that of configs/paper/weight_decay_*.py,
                            # whose learning rate is our guess. The other families of the paper have other step counts:
                            # there the product is 0.5 (depth), 2 (gqa, moe, ladder) or 4 (context) times that of
                            # configs/paper. One decay for all lets the families share their baseline
eval_interval = 500
save_interval = 500         # an interrupted run repeats at most this many steps
