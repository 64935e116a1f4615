"""A study: what does mixing the weights of two domains' models give on both domains?"""
