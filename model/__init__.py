"""The mathematics: backbone, margins, the sharded Partial-FC head and its optimizer. Reads no config file, no environment, no clock."""
