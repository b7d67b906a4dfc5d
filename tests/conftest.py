"""Its place puts this folder on the path of every test below it, for `nets`."""
