"""`pretrain serve`: a checkpoint behind OpenAI's protocol.

A request comes in at `app`, is checked by `api`, becomes one or more `jobs`, waits in `engine` until there is room, and
is answered piece by piece by the one thread that has the model; `answers` has the shapes of what goes out.
"""
