"""Be Your Own Teacher (Zhang et al., ICCV 2019): the method and its trainer."""
