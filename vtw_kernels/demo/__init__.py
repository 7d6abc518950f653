"""A small vision-language model of the package's own, with images and questions to try withdrawal on."""
