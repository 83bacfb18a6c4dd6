"""This process among its peers: who it is, collectives that autograd follows, shared batch norm."""
