"""Tasks, one file each: how a model is called and scored. `conf/task` names them."""
