"""The command line, its pictures and its checks."""
