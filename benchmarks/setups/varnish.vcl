# varnish as a cache, tuned: everything that is well stays a week, one fetch for each path, readers
# follow it while it comes (beresp.do_stream, the default). It has no limit of connections that
# would make a request wait: with .max_connections it answers 503 beyond.
vcl 4.1;

backend registry {
    .host = "127.0.0.1";
    .port = "@UPSTREAM@";
    .first_byte_timeout = 1h;
    .between_bytes_timeout = 1h;
}

sub vcl_recv {
    if (req.url == "/__ready") {
        return (synth(200));
    }
    unset req.http.Cookie;
    return (hash);
}

sub vcl_hash {
    hash_data(req.url);
    return (lookup);
}

sub vcl_backend_response {
    if (beresp.status == 200) {
        set beresp.ttl = 7d;
    } else {
        set beresp.uncacheable = true;
        set beresp.ttl = 1s;
    }
    return (deliver);
}
