"""Published checkpoints in and out: `bestiary weights inspect|import|export`.

`families` knows which model published names belong to, `importing` and `exporting` convert tensor by tensor, `folder`
is what an import leaves on disk, `inspecting` only looks. Layouts of files belong to their variant
(`variants/sphinx/consolidated.py`), and so do the rules of names (`variants/*/weights.py`).
"""
