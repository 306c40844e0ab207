"""Other people's layouts of the same model: their configs and tensor names, in and out."""
