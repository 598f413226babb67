// Drives the unmodified phoenix client: commands as JSON lines on stdin, what happens as JSON lines on stdout.
//
//   node phoenix.mjs FOLDER_WITH_NODE_MODULES
//
//   {"do": "connect", "socket": "s", "url": "ws://host:port/socket", "transport": "websocket" | "longpoll", "options": {…}}
//       options: params, authToken, vsn, heartbeatIntervalMs, longPollFallbackMs, reconnectAfterMs, rejoinAfterMs (numbers)
//   {"do": "join", "socket": "s", "topic": "t", "params": {…}}
//   {"do": "push", "socket": "s", "topic": "t", "event": "e", "payload": {…} | {"$hex": "00ff"}, "tag": "any"}
//   {"do": "leave", "socket": "s", "topic": "t"}
//   {"do": "disconnect", "socket": "s"}
//
//   {"on": "open" | "close" | "error", "socket", "code"?, "reason"?}
//   {"on": "joined" | "refused" | "join_timeout", "socket", "topic", "response"}      ("joined" comes again after a rejoin)
//   {"on": "reply", "socket", "topic", "tag", "status": "ok" | "error" | "timeout", "response"}
//   {"on": "event", "socket", "topic", "event", "payload"}
//   {"on": "presence", "socket", "topic", "present": {KEY: number of metas}}
//   {"on": "channel_error" | "channel_close" | "left", "socket", "topic", "reason"?}

import {createRequire} from "node:module"
import {createInterface} from "node:readline"

const require = createRequire(`${process.argv[2]}/`)
const {LongPoll, Presence, Socket} = require("phoenix")
const {WebSocket} = require("ws")

const sockets = new Map()

const plain = (value) =>
  value instanceof ArrayBuffer ? {$hex: Buffer.from(value).toString("hex")} : value

const print = (message) => process.stdout.write(`${JSON.stringify(message)}\n`)

const payloadOf = (payload) => {
  if(payload && payload.$hex !== undefined){
    const bytes = Buffer.from(payload.$hex, "hex")
    return bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.byteLength)
  }
  return payload
}

const commands = {
  connect({socket: id, url, transport, options}){
    const {authToken, reconnectAfterMs, rejoinAfterMs, ...rest} = options || {}
    const socket = new Socket(url, {
      transport: transport === "longpoll" ? LongPoll : WebSocket,
      ...(authToken !== undefined && {authToken}),
      ...(reconnectAfterMs !== undefined && {reconnectAfterMs: () => reconnectAfterMs}),
      ...(rejoinAfterMs !== undefined && {rejoinAfterMs: () => rejoinAfterMs}),
      ...rest,
    })
    sockets.set(id, {socket, channels: new Map()})
    socket.onOpen(() => print({on: "open", socket: id, transport: socket.conn instanceof LongPoll ? "longpoll" : "websocket"}))
    socket.onClose((event) => print({on: "close", socket: id, code: event.code, reason: String(event.reason)}))
    socket.onError((error) => print({on: "error", socket: id, reason: String((error && error.message) || error)}))
    socket.connect()
  },

  join({socket: id, topic, params}){
    const {socket, channels} = sockets.get(id)
    const channel = socket.channel(topic, params || {})
    channels.set(topic, channel)
    const presence = new Presence(channel)
    presence.onSync(() => {
      const present = {}
      presence.list((key, {metas}) => { present[key] = metas.length })
      print({on: "presence", socket: id, topic, present})
    })
    channel.onMessage = (event, payload) => {
      if(!event.startsWith("phx_") && !event.startsWith("chan_reply_")){
        print({on: "event", socket: id, topic, event, payload: plain(payload)})
      }
      return payload
    }
    channel.onError((reason) => print({on: "channel_error", socket: id, topic, reason: plain(reason)}))
    channel.onClose((reason) => print({on: "channel_close", socket: id, topic, reason: plain(reason)}))
    channel.join()
      .receive("ok", (response) => print({on: "joined", socket: id, topic, response}))
      .receive("error", (response) => print({on: "refused", socket: id, topic, response}))
      .receive("timeout", () => print({on: "join_timeout", socket: id, topic}))
  },

  push({socket: id, topic, event, payload, tag}){
    const push = sockets.get(id).channels.get(topic).push(event, payloadOf(payload))
    for(const status of ["ok", "error", "timeout"]){
      push.receive(status, (response) => print({on: "reply", socket: id, topic, tag, status, response: plain(response)}))
    }
  },

  leave({socket: id, topic}){
    sockets.get(id).channels.get(topic).leave().receive("ok", () => print({on: "left", socket: id, topic}))
  },

  disconnect({socket: id}){
    sockets.get(id).socket.disconnect(() => print({on: "disconnected", socket: id}))
  },
}

createInterface({input: process.stdin}).on("line", (line) => {
  const command = JSON.parse(line)
  commands[command.do](command)
}).on("close", () => process.exit(0))
