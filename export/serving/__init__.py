"""Bundles behind servers: from encoded pictures to answers, row by row, and what there is to watch.

| file | what | needs |
|---|---|---|
| pictures.py | requests of pictures in, answers out, whatever the server | onnxruntime |
| watch.py | how often and how much the defense changes answers | |
| triton_models.py | the models that a repository names, in Triton's Python backend | Triton |
"""
