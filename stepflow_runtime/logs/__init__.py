"""The server's output: how it is wished for, decoded, and carried to where people look."""
