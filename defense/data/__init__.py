"""Pictures and words coming in: decoding, preprocessing, labels, folders and archives. No torch."""
