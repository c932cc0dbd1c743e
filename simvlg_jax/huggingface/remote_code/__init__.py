"""The code of exported folders; `modeling_simvlg` is what transformers loads. It needs torch and transformers."""
