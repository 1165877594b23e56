"""The live page of a run folder: the report over HTTP. It updates itself, and may have the queue's buttons.

Reading order: ``sources`` (which run folders, each read at most once a second), ``hub`` (one reader thread for all
clients), ``access`` (who may read and change), ``app`` (the addresses), ``connections`` (of clients that do not speak),
``server`` (sockets, signals, what is printed). Only the command that serves imports these modules: starlette and
uvicorn cost other programs nothing.
"""
