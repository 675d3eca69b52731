"""The process that runs the functions of ``components=``, started by the server.

The server starts ``__main__.py``, which keeps a worker there, by a fork: ``loading`` finds
the functions, ``serving`` serves them. Neither is imported by a program that has a runtime.
"""
