"""Files of a data set at a URL: whole files and byte ranges, verified, through any outage.

store.py        Store: a folder at https://, s3://, gs://, az://, hf:// or `pipe:`
urls.py         which URLs there are, and how names of files are appended
transports.py   one attempt of one request: object_store.py, web_server.py, program.py
answers.py      what the answer of a store means: what can pass, what cannot
outages.py      how long failures are waited for, and how that is reported
credentials.py  credentials and time-outs of the object stores
"""
