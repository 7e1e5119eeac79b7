# The paper's experiments on a laptop. Names are those of configs/paper/, so that a table can show our row beside the
# paper's. Each file says which size of the paper its size stands for. All runs of a family see the same tokens.
data = "data/python"        # in bytes
n_layer = 8                 # stands for the paper's 16: depths are halved, 6 8 12 16 for 12 16 24 32
n_head = 4                  # for G = 1, 2, 4
n_embd = 64                 # narrow, so that 16 layers train in minutes on one core; depth is what is studied
init_std = 0.113            # 0.02 * sqrt(2048 / n_embd). The paper's 0.02 at width 2048 is 0.905 / sqrt(width). With
                            # this value a block adds as much variance as in the paper. With 0.02 at width 64 it
                            # adds a thousandth of that, and block 0 comes to dominate the stream in training
block_size = 128            # stands for 2048: contexts are a sixteenth, 16 ... 512 for 256 ... 8192

learning_rate = 3e-3        # suits a model this narrow. After 2,000 steps the usefulness of 8 layers is in the
max_steps = 2000            # middle of its range, so that another run can be better or worse
tokens_per_step = 1024      # half of train.py's default, for runs of minutes on one core; 2M tokens in all
warmup_steps = 100          # 5%, the share of the paper's depth runs (1,000 of 19,000)
weight_decay = 0.064        # stands for 0.1. The effect of decay depends on learning_rate x weight_decay x steps. Our
                            # decays are 0.64 times the paper's, so that this product is the same as in
                            # configs/paper/weight_decay_*.py, whose learning rate is our guess. All families have
                            # this decay, because they share their baseline. The paper's other families have other
                            # numbers of steps: there our product is 0.5 (depth), 2 (gqa, moe, ladder) and 4
                            # (context) times the paper's
eval_interval = 500
save_interval = 500         # an interrupted run repeats at most this many steps
