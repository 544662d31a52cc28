"""The commands that need no Trainer, one module each; `__main__` calls their `main(args)`."""
