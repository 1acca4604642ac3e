"""minipeft: parameter-efficient fine-tuning, written to be read and good enough to be used."""
