"""Stage 3: do hyper-parameters and mixtures found on small models hold on large ones?"""
