-- What wrk asks for, and its counts as one line of JSON.
--
--   wrk … URL -- [unique] [FILE]
--
-- Without words every request is the URL's, in the same bytes. `unique` puts a header into each that
-- no other has. FILE holds paths, one a line, asked for in turn.
function init(args)
  wrk.headers["Accept"] = "application/vnd.oci.image.manifest.v1+json"
  local heads = {}
  local is_unique = args[1] == "unique"
  local file = args[is_unique and 2 or 1]
  if file then
    for path in io.lines(file) do heads[#heads + 1] = wrk.format("GET", path) end
  else
    heads[1] = wrk.format("GET")
  end
  local count, number = #heads, 0
  if is_unique then
    for at = 1, count do heads[at] = heads[at]:sub(1, -3) .. "X-Unique: " end
    request = function()
      number = number + 1
      return heads[number % count + 1] .. number .. "\r\n\r\n"
    end
  elseif count > 1 then
    request = function()
      number = number + 1
      return heads[number % count + 1]
    end
  end
end

function done(summary, latency, requests)
  local failed = summary.errors
  io.write(string.format(
    '{"requests": %d, "size": %d, "seconds": %.6f, "failed": %d, "p50": %.6f, "p99": %.6f}\n',
    summary.requests, summary.bytes, summary.duration / 1e6,
    failed.connect + failed.read + failed.write + failed.status + failed.timeout,
    latency:percentile(50) / 1e6, latency:percentile(99) / 1e6))
end
