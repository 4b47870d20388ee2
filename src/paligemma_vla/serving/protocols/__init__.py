"""One file per wire protocol: how a client's messages are read, and how it is answered."""
