"""Writes golden.npz: weights and logits of the notebook's own class, for test_model.py.

python tests/golden.py NOTEBOOK.txt

Reads the notebook's text and runs its class AllCNN; none of its code is kept here.
"""

import re
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

text = Path(sys.argv[1]).read_text()
source = re.search(r"^class AllCNN.*?^        return y$", text, re.M | re.S)[0]
scope = {"nn": nn}
exec(source, scope)

torch.manual_seed(43)
images = torch.randn(3, 3, 32, 32)
out = {"images": images.numpy()}
for residuals in (False, True):
    net = scope["AllCNN"](c=4, residuals=residuals)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):  # as after training, not 0 and 1
            for values in (layer.weight, layer.running_var):
                nn.init.uniform_(values, 0.5, 1.5)
            for values in (layer.bias, layer.running_mean):
                nn.init.normal_(values, std=0.3)
        if isinstance(layer, nn.Dropout2d):
            layer.p = 0.0
    kind = "residual" if residuals else "plain"
    out |= {f"{kind}/{k}": v.numpy().copy() for k, v in net.state_dict().items()}
    with torch.no_grad():
        out[f"{kind}-eval"] = net.eval()(images).numpy()
        out[f"{kind}-train"] = net.train()(images).numpy()
np.savez_compressed(Path(__file__).with_name("golden.npz"), **out)
