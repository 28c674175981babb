"""How one weight may be stored: the contract (`contract`), and one file for each family of layouts."""
