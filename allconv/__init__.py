"""allconv: the All-Convolutional Net on CIFAR-100, a parameter-efficient baseline."""
