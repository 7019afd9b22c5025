"""Which backend is the fastest on this machine, beside stock peft.

shapes          known decoders and their linears
provider        what a provider is; the weights that those of a case share
peft_providers  the frozen layer, stock peft in the ways people run it
ours            GraspLoRALinear, on each backend
errors, gate    what a result may be off; refuses to time a provider whose results are wrong
timing          forward and backward, all providers in turn
backends        puts them together: the backends on the linears of a model
"""
