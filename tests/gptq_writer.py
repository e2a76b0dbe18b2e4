"GPTQ checkpoints by plain rounding, in numpy: 4 or 8 bits, any group size, symmetric or not, zeros of either dialect"

import json, shutil
from pathlib import Path
import numpy as np


def quantise(w, bits=4, group=64, act=False, sym=True, v1=True, seed=0):
    "Tensors of one layer from its weight [out, in], as numpy arrays, and the float32 weight [out, in] after rounding"
    w = np.asarray(w, np.float32).T  # [in, out]
    n_in, n_out, top = *w.shape, 2**bits - 1
    group = n_in if group == -1 else group
    g_idx = np.arange(n_in) // group
    if act:
        g_idx = np.random.default_rng(seed).permutation(g_idx)
    scales, zeros, q = (
        np.zeros((n_in // group, n_out), np.float16),
        np.zeros((n_in // group, n_out), np.int64),
        np.zeros((n_in, n_out), np.int64),
    )
    for g in range(n_in // group):
        rows = w[g_idx == g]
        if sym:
            s, z = np.abs(rows).max(0) / (top // 2), np.full(n_out, 2 ** (bits - 1))
        else:
            lo, hi = np.minimum(rows.min(0), 0), np.maximum(rows.max(0), 0)
            s = (hi - lo) / top
            z = np.rint(-lo / np.maximum(s, 1e-8)).astype(np.int64)
        s = np.maximum(s, 1e-4).astype(np.float16)
        scales[g], zeros[g] = s, z.clip(1 if v1 else 0, top)  # 0 has no place in the first dialect
        q[g_idx == g] = (np.rint(rows / s.astype(np.float32)) + zeros[g]).clip(0, top)
    meant = (q - zeros[g_idx]).astype(np.float32) * scales[g_idx].astype(np.float32)
    per = 32 // bits

    def pack(o):
        return (
            sum(o[..., i].astype(np.uint32) << np.uint32(bits * i) for i in range(per)).astype(np.uint32).view(np.int32)
        )

    return dict(
        qweight=pack(q.T.reshape(n_out, -1, per)).T.copy(),
        qzeros=pack((zeros - v1).reshape(len(zeros), -1, per)),
        scales=scales,
        g_idx=g_idx.astype(np.int32),
    ), meant.T


def read(t, bits, v1=True):
    "The weight [out, in] of one layer, one number at a time: slow, and independent of everything"
    per, top = 32 // bits, 2**bits - 1

    def word(o):
        return int(o) & 0xFFFFFFFF

    n_in, n_out = t['qweight'].shape[0] * per, t['qweight'].shape[1]
    w = np.zeros((n_out, n_in), np.float32)
    for i in range(n_in):
        g = t['g_idx'][i]
        for o in range(n_out):
            q = word(t['qweight'][i // per, o]) >> bits * (i % per) & top
            z = (word(t['qzeros'][g, o // per]) >> bits * (o % per) & top) + v1
            w[o, i] = np.float32(q - z) * np.float32(t['scales'][g, o])
    return w


def checkpoint(src, dst, bits=4, group=64, act=False, sym=True, v1=True, shards=1, bias=False):
    "A GPTQ copy of a base folder: every linear layer of the backbone quantised. Returns name: meant weight"
    import torch
    from safetensors.torch import load_file, save_file

    src, dst = Path(src), Path(dst)
    dst.mkdir(parents=True, exist_ok=True)
    out, meant = {}, {}
    for k, v in load_file(src / 'model.safetensors').items():
        if not k.endswith('_proj.weight'):
            out[k] = v
            continue
        t, meant[k] = quantise(v.float().numpy(), bits, group, act, sym, v1, seed=len(out))
        out |= {k.replace('weight', n): torch.from_numpy(a) for n, a in t.items()}
        if bias:
            out.setdefault(k.replace('weight', 'bias'), torch.zeros(len(v)))
    for f in [*src.glob('*.json'), *src.glob('*.jinja')]:
        if f.name not in ('manifest.json', 'model.safetensors.index.json'):
            shutil.copy(f, dst)
    names = sorted(out)
    files = {
        f'model-{i + 1:05}-of-{shards:05}.safetensors' if shards > 1 else 'model.safetensors': names[i::shards]
        for i in range(shards)
    }
    for f, ks in files.items():
        save_file({k: out[k] for k in ks}, dst / f, metadata=dict(format='pt'))
    if shards > 1:
        (dst / 'model.safetensors.index.json').write_text(
            json.dumps(dict(metadata={}, weight_map={k: f for f, ks in files.items() for k in ks}))
        )
    q = dict(
        quant_method='gptq',
        bits=bits,
        group_size=group,
        sym=sym,
        desc_act=act,
        checkpoint_format='gptq' if v1 else 'gptq_v2',
        lm_head=False,
        true_sequential=True,
    )
    (dst / 'config.json').write_text(
        json.dumps(json.loads((src / 'config.json').read_text(encoding='utf-8')) | dict(quantization_config=q))
    )
    return meant
