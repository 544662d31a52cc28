"""What surrounds the experiment in `fit`, `validate` and `test`: LightningCLI and callbacks."""
