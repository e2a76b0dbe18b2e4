"""Does the packed forward give the plain model's probabilities, on this device and in its dtype? Prints the largest
difference of an option's probability.

usage: python bench/parity.py [base]
(base: smollm2, a folder or a Hub id; fp32 and the device's own 16-bit dtype are tried)"""
import sys
import pandas as pd
import torch
from competition_kit.base import base_path, load_tokenizer, pick_dtype
from competition_kit.core import device_name
from competition_kit.model import dtypes, load_classifier, view_probs
from competition_kit.prompt import Prompt
from competition_kit.tables import load_rows
from transformers import AutoModelForCausalLM

base = sys.argv[1] if len(sys.argv) > 1 else 'smollm2'
rows = load_rows('sample_arena').head(64).reset_index(drop=True)
prompt = Prompt(load_tokenizer(base), 'preference', 512)
enc = prompt.encode(rows)
out = []
for dtype in dict.fromkeys(('fp32', pick_dtype())):
    classifier = load_classifier(base, prompt, dtype=dtype)
    plain = AutoModelForCausalLM.from_pretrained(base_path(base), dtype=dtypes[dtype], attn_implementation='eager')
    plain = plain.to(classifier.device).eval()
    def probs(ids):
        logits = plain(torch.tensor(ids, device=classifier.device)[None].long()).logits
        return logits[0, -1, prompt.letters].float().softmax(-1)
    with torch.no_grad(): want = torch.stack([probs(i) for i in enc.ids]).cpu()
    got = {b: torch.from_numpy(view_probs(classifier, enc, [3]*len(rows), b, progress=False)) for b in (1, 512, 8192)}
    gaps = {f'pack {b}' if b > 1 else 'one a pack': float((g-want).abs().max()) for b, g in got.items()}
    out.append(dict(device=device_name(), dtype=dtype, **gaps))
print(pd.DataFrame(out).to_string(index=False))
