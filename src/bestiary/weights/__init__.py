"""Weights in, out and together: `bestiary weights inspect|import|export|mix|merge|adapter`.

`layouts` lists what is known: the published layouts of whole models and of single parts, each in its variant's folder
(`variants/*/layout.py`, `variants/*/parts.py`; rules of names in `variants/*/weights.py`). `importing`, `parts` and
`exporting` convert tensor by tensor, `difference` writes deltas, `checking` refuses what does not fit, `folder` is what
an import leaves on disk, `ours` reads weights of ours, `inspecting` only looks, `mixing` joins two models, `merging`
adds adapters to their base.
"""
