"""Train a tiny Qwen2.5-VL from scratch on the tags data: the base model that ships with the project.

Everything that the model itself sees at inference is standard (its own tokenizer, the real image processor, the
unmodified Hugging Face modules); what is special is the supervision that makes two million parameters learn to read
and bind within minutes on a CPU, all of it discarded afterwards:

- every question about an image is packed behind one shared image prefix (block-diagonal mask, positions restarted),
  so that each question sees exactly what it would see alone;
- auxiliary heads: colour and digits of the tag under a visual token, read from the vision tower; row, column, colour
  and number of the tag at the input of decoder layer ``aux_layer``; columns of the two tags of a ``relation`` question;
- Muon for the matrices of the blocks, AdamW for the rest; a dense 224-px start, then few tags, then 8 to 12;
- **key dropout** over the last fifth: with some probability the question rows above the pruning layer, and the answer
  rows everywhere, see only the evidence boxes. This favours pruning and is declared wherever the base is reported.
"""
