"""Media keeps pictures, films, sounds and documents, in clear for the server or not, and gives them to who may see them."""
